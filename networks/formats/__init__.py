"""Layouts of adapter files, one module a tool."""
