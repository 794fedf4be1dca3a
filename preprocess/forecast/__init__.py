"""How long a build will take, and what bounds it, before it runs."""
