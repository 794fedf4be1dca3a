"""HTML pages that are one file each: layout and charts."""
