"""Sphinx configuration: builds offline, with warnings as errors; see `.ci/run` for the two commands."""

import gaal_surgery

project = "gaal_surgery"
author = "the gaal_surgery developers"
version = release = gaal_surgery.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_copy_source = False

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# Types of torch and the standard library would need their inventories from the network, and private aliases in
# signatures have no page of their own.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|matplotlib|typing|gaal_surgery\.projection)\..*"),
    (
        "py:.*",
        r"Tensor|Optimizer|ProcessGroup|Axes|Any|Callable|Iterator|Literal|Mapping|Sequence|Gradient|Logits|LossFn|Rule|Uncertainty",
    ),
]

doctest_global_setup = """
import os
os.environ["MPLBACKEND"] = "Agg"
import torch
import torch.nn.functional as F
from gaal_surgery import *
torch.set_num_threads(1)
torch.manual_seed(0)
"""
