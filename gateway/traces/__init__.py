"""Traces: spans of each request, told to an OpenTelemetry collector by OTLP."""
