"""One row of each benchmark, without its picture."""

ROWS = {
    "pope": {"id": "0", "question": "Is there a cup in the image?", "answer": "yes", "category": "random"},
    "cvbench": {
        "id": "0", "type": "2D", "task": "Count", "source": "COCO", "question": "How many cats are in the image?",
        "prompt": "How many cats are in the image? Select from the following choices. (A) 2 (B) 1 (C) 4 (D) 3 (E) 0",
        "choices": ["2", "1", "4", "3", "0"], "answer": "(B)",
    },
    "ocrbench": {"id": "0", "dataset": "IIIT5K", "question": "what is written in the image?",
                 "question_type": "Regular Text Recognition", "answer": ["Café 12"]},
    "hallusionbench": {
        "id": "0", "category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1", "question_id": "0",
        "question": "Is China the leading country?", "gt_answer": "0", "gt_answer_details": "Switzerland leads.",
    },
    "realworldqa": {"id": "0", "question": "Which way?\nA. left\nB. right\nAnswer with the letter.", "answer": "B"},
}  # fmt: skip
