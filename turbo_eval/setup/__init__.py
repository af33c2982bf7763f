"""From nothing to a project, and what is missing in one."""
