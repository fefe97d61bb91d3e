"""Plug-ins for other packages. None of them is a dependency: each is imported by the package that it is for."""
