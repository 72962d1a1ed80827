#!/usr/bin/env bash
# Certificates and keys for a federation: bash flower/keys.sh FOLDER HOST USER...
#
# ca.crt goes to every machine; server.pem and server.key to the SuperLink on HOST, a name or an
# address; USER (private) to the device of that user, USER.pub to the person who registers nodes;
# ca.key, which can sign more certificates, to a safe place.
# Existing files stay, so that users can be added. Needs OpenSSL 3 and ssh-keygen.
set -euo pipefail
umask 077
mkdir -p "$1"
cd "$1"
case $2 in *[!0-9.]*) kind=DNS ;; *) kind=IP ;; esac
curve="-newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes"
[ -e ca.crt ] || openssl req -x509 $curve -days 3650 -subj "/CN=CoMiGS" -keyout ca.key -out ca.crt
[ -e server.pem ] || openssl req $curve -subj "/CN=$2" -addext "subjectAltName=$kind:$2" -keyout server.key -out server.csr
[ -e server.pem ] || openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -days 825 -copy_extensions copy -out server.pem
for user in "${@:3}"; do [ -e "$user" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "$user" -f "$user"; done
