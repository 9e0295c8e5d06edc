"""Long runs through the whole product, outside the suite: `make soak pooling routes closes`."""
