"""Where the paper's data sets are published."""

PAGES = {
    "dvm": "https://deepvisualmarketing.github.io/",
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "sun": "https://cs.brown.edu/~gmpatter/sunattributes.html",
}
