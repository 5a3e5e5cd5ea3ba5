"""The module that holds the integers."""
