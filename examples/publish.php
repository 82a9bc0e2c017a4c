<?php
// Publishes a message on a bus: publish("http://localhost/cgi-bin/chat", ["move" => "e4"]). It sends again what had no
// answer, and the message is published once. From a shell: php publish.php URL MESSAGE, with MESSAGE as JSON.

function publish(string $bus, mixed $data, int $tries = 5): int
{
    $once = bin2hex(random_bytes(16));
    $options = ['method' => 'POST', 'content' => json_encode($data), 'timeout' => 10, 'ignore_errors' => true];
    $options['header'] = 'Content-Type: application/json';
    for ($try = 1; ; $try++) {
        $text = @file_get_contents("$bus?user=0&once=$once", false, stream_context_create(['http' => $options]));
        $reply = json_decode($text ?: '', true);
        if (isset($reply['id'])) {
            return $reply['id'];
        }
        $status = $text === false ? 0 : (int) explode(' ', $http_response_header[0])[1];
        $may_pass = $status === 0 || $status >= 500 || ($reply['error'] ?? '') === 'once_undecided';
        if (!$may_pass || $try === $tries) {
            throw new RuntimeException($reply['message'] ?? "The bus cannot be reached: status $status.");
        }
        sleep($try);
    }
}

if (PHP_SAPI === 'cli' && realpath($argv[0]) === __FILE__) {
    echo publish($argv[1], json_decode($argv[2], false, 512, JSON_THROW_ON_ERROR)), "\n";
}
