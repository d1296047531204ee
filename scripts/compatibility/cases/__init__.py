"""The cases, a module for each library; imported where the library is installed."""
