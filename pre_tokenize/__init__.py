"""Scripts that turn raw JSON into token files and records."""
