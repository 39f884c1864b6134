"""A library that sets a variable of the environment when it is imported, as torch._dynamo does."""

import os

os.environ["EXTRA"] = "of a library"
