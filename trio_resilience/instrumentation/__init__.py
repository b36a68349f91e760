"""Listeners that hand on events to the tools that an application is watched by, a file each."""
