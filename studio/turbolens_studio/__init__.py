"""The studio: explore, paint and compare in a browser. An ordinary client of the SDK, with a page in front of it."""
