"""The files of a release: `make release` makes them in dist/, from dist/netloom and this repository."""
