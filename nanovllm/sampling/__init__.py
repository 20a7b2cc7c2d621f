"""Sampling of requests that go beyond a temperature."""
