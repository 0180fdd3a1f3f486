"""The HTML pages: each module renders one kind of plain result record to one offline file."""
