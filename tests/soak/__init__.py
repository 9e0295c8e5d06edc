"""Long runs through the whole product, outside the suite: `make soak routes closes`."""
