"""`wanprep init`: a user's project folder, with the configs of both stages."""
