"""Modules, data and checks that several test modules share; no test is in here."""
