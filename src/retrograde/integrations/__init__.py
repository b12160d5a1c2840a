"""Callbacks for other libraries' trainers, each in a module of the library's name, which imports that library."""
