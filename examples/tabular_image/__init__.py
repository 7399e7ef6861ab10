"""Train image-and-table classifiers, with and without gradient surgery."""
