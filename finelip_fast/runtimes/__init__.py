"""What lies beside a checkpoint: exported encoders with a manifest, and what runs each kind of file."""
