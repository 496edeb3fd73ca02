"""HTML pages, with one set of charts."""
