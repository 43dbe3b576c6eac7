#!/bin/sh
# sh examples/predict.sh PHOTO [URL]
set -eu
photo=$1
url=${2:-http://127.0.0.1:8000}

# a form: as many images as you like, labels of your own
curl -sSf -F "images=@$photo" -F "images=@$photo" -F "labels=taking a photo, sleeping" -F top_k=2 "$url/v1/predict"
echo
# the image alone
curl -sSf --data-binary "@$photo" -H "Content-Type: image/jpeg" "$url/v1/predict?labels=taking%20a%20photo,sleeping"
echo
# a vocabulary, which is a list of labels under a name, and a request that uses it
curl -sSf -X PUT -H "Content-Type: application/json" -d '["mowing the lawn", "taking a photo"]' "$url/v1/labels/garden"
echo
curl -sSf -F "images=@$photo" -F labels=garden "$url/v1/predict"
echo
