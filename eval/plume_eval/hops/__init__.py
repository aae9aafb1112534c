"""Hops, the built-in task: pictures that must be reasoned over before they can be matched."""
