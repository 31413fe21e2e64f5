"""Templates of the pages: `page.html.jinja` is the frame of every report, `show.html.jinja` a table with its title."""
