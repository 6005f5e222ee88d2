"""Exported encoders beside a checkpoint, with their manifest, and the code that runs each kind of file."""
