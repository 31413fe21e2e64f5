"""Text to mask (paper section 3.2.2, appendix A): backends, filters, a resumable runner, and what masks are worth."""
