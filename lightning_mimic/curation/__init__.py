"""Offline: from recorded scores to decisions."""
