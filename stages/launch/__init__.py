"""Starting the processes of a stage: torch's launcher and Ray."""
