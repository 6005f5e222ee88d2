"""``finelip serve``: search pictures in a browser and over HTTP."""
