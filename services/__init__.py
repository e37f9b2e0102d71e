"""The processes of a deployment that end sessions: three examples to copy from, one file each."""
