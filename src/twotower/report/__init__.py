"""What reports are made of: tables for terminals, pages and documents, and the frame of a page."""
