"""HTML pages for people, with one set of charts."""
