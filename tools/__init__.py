"""What makes pages, pictures and models of the repository; not part of the package."""
