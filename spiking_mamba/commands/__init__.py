"""The console command: a module with a ``main`` each, and the configurations that come with the package."""
