"""The payloads of CloudStack's calls: a checked Struct for each form of payload, one file for each feature."""
