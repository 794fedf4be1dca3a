"""Pages of one HTML file: layout and charts."""
