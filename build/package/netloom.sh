#!/bin/sh
# CloudStack compares this file between its management servers, so no release ever changes it; what it starts may change.
exec /usr/lib/netloom/netloom "$@"
