"""Reports as pages and pictures: HTML that stands alone, SVG and PNG."""
