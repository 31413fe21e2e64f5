"""The paper's other systems (section 4, Table 2) as transformers classes, and a concatenating twin of ours."""
