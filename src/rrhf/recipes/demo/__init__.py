"""The demo's parts: film reviews as records, and two classifiers of their sentiment as rewards."""
