"""`wanprep init`: writes a project folder with the configs of both stages."""
