"""Adapters to other people's engines, each in a module of its own that needs that engine installed."""
