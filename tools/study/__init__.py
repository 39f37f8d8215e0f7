"""Study "How much of it is the loss?": its runs, what is measured of them, and the page that is made of that."""
