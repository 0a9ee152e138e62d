"""The record, its files, foreign formats, and long work in resumable parts."""
