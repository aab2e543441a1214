"""What every report is made of: tables for terminals, pages and documents, and the frame of a page."""
