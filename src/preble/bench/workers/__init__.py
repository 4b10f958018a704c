"""What worker processes cost beside threads, and how long the event loop is kept."""
