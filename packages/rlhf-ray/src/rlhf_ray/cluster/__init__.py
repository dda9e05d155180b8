"""Where processes run and how the driver speaks with them."""
