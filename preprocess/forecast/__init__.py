"""Before a build runs: how long it will take, and what limits its speed."""
